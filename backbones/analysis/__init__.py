"""Numbers and pictures of what a vision transformer does inside. Nothing of the model is changed."""
