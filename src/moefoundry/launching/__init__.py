"""Scripts and manifests with which schedulers start a run, and the commands that submit them.

A module for each scheduler makes its files from a :class:`~moefoundry.launching.job.Job`. Nothing here starts, watches
or restarts machines: that is the scheduler's part.
"""
