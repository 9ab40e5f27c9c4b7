"""How good a model is: held-out items, scores, judges and the sandbox they run code in."""
