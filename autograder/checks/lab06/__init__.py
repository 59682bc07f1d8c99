"""Checks of Lab 6: steps against time. None of them looks at how fast a machine is."""
