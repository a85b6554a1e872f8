"""Steps between an info record and the input of the model."""
