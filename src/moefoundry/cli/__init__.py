"""The ``moefoundry`` command: one thin file for each subcommand."""
