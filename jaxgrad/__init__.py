"""Gradient descent, minibatch SGD and backprop in JAX."""
