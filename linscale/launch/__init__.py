"""Before and around a run on many devices: what a pod would do with a config, and the scripts that start it there."""
