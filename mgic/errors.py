"""The errors a user can cause. The command line prints them as one line and exits with status 2."""


class UserError(ValueError):
    """Bad input: the message names the offending value and says what would work."""


class ChannelConfigError(UserError):
    """Widths, groups or grids that cannot be built."""
