"""Reports from run folders: tables, significance tests, figures, one HTML page.

It reads what train wrote, changes nothing and needs no torch.
"""
