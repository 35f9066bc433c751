"""Messages and images to tensors. Start with `processor`, which every other package uses."""
