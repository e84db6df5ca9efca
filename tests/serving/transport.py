"""A connection without a network, for tests that speak to the protocol itself."""

import asyncio


class Transport(asyncio.Transport):
    """What was written, and whether it was closed."""

    def __init__(self):
        super().__init__()
        self.said, self.is_closed = b"", False

    def write(self, data):
        self.said += data

    def close(self):
        self.is_closed = True

    def is_closing(self):
        return self.is_closed

    def get_extra_info(self, name, default=None):
        return default

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass
