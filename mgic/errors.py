"""The errors a user can cause. The command line prints them as one line and exits with status 2."""


class UserError(ValueError):
    """Bad input: the message names the offending value and says what would work."""


class ChannelConfigError(UserError):
    """Widths, groups or grids that cannot be built."""


class Stopped(Exception):  # noqa: N818  (nobody did anything wrong)
    """Work that ended early for a reason its user must know; ``exit_code`` is the command's exit status."""

    exit_code = 1
