"""The ε-network: tensors in, tensors out."""
