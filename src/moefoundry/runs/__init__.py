"""Runs, as the files in their directories tell of them: tables, live views and reports. Needs no torch."""
