"""Side-by-side comparisons of moefoundry with its peers. Start at ``run.py``; ``README.md`` says what is measured."""
