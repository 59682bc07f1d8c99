"""difflab, the kit of the diffusion sampling labs: models, data, measurements and plots, but no sampler.

What a student is asked to write is not in here: commands that need a sampler take it from a notebook.
"""

__version__ = "0.1.0"
