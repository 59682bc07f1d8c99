"""Checks of Lab 5, sampling: one module for each graded class."""
