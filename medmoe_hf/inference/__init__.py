"""Images and texts to embeddings and scores, by our model and by others."""
