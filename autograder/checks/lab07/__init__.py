"""Checks of Lab 7, a lightweight diffusion model: one module for each part."""
