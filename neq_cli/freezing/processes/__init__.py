"""All processes hold the same frozen sets, and send only the gradients of what trains."""
