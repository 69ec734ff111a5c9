"""What a trained model does: generation."""
