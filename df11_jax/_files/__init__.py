"""The files that tensors lie in, whatever the layout of the tensors."""
