"""The default handler of SIGINT for children that a test interrupts, even if the suite itself ignores SIGINT."""

import signal


def default_sigint() -> None:
    """Undo an inherited `nohup ... &`; for `preexec_fn` of subprocess.Popen."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
