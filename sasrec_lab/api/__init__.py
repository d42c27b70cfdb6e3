"""What `import sasrec_lab` offers to Python and notebooks: compose, train_model, load_run and load_sweep."""
