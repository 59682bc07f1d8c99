"""Checks of Lab 4, training: one module for each part."""
