"""The functions that `import sasrec_lab` offers to Python: compose, train_model, load_run and load_sweep."""
