"""Train, evaluate and compare SASRec-style sequential recommenders."""

import sys

__version__ = "0.1.0"

# A command's first line of this package: from here on Ctrl-C ends it in one line, also while its modules are imported.
# sys.argv[0] is "-m" only while Python looks for the module to run; processes that a command starts have other words.
if sys.argv[:1] == ["-m"] or (sys.orig_argv[1:2] == sys.argv[:1] and "/sasrec-" in "".join(sys.argv[:1])):
    from sasrec_lab.run.signals import exit_at_once

    exit_at_once()
