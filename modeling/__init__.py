"""What model.py is built from: attention masks, rotary tables, key/value caches, ternary layers, devices."""
