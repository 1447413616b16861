"""Search spaces for `python -m pipelines.tune --space NAME`: dotted settings → ray.tune domains, one file a space.

A choice in quotes is read as YAML, as after `--set`: "[0.5, 1.0]" is a list.
"""
