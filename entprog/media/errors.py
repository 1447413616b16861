"""What is said of a picture or a video that cannot be used."""

REASONS = (
    "empty",
    "unreadable",
    "corrupt",
    "unsupported",
    "no_video_stream",
    "no_frames",
    "too_large",
    "too_long",
)


class VideoError(Exception):
    """A video or picture that cannot be read. `reason` is one of REASONS, the message says the rest in one line."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # picklable: it crosses Ray's process borders
        return VideoError, (self.reason, str(self))
