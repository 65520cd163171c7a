"""From text, chats and preferences to packed shards, and from shards to batches."""
