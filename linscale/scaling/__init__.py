"""Counting, ladders of runs, scaling laws and their report. Import the modules by name; this one imports none."""
