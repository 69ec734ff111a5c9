"""What a recipe means before anything runs: sizes and costs."""
