"""The errors that a caller may want to catch. Everything else that goes wrong is a built-in exception."""


class AgentGymError(Exception):
    """Root of this package's own errors; its message is meant to be shown to the user as it stands."""


class SearchFailed(AgentGymError):
    """A search that could not be carried out. The environments end that episode and leave it out of the update."""


class CorpusError(AgentGymError, ValueError):
    """A corpus or question file with a line that cannot be used; the message names file and line."""


class HubUnreachable(AgentGymError):
    """The Hugging Face hub cannot be reached; the message says how to go on with files."""


class IndexUnusable(AgentGymError):
    """An index folder that is missing, damaged or of another version; the message says how to build one."""


class BuildFailed(AgentGymError):
    """An index that could not be built; what was built so far is kept, and the message says how to go on."""


class CheckpointError(AgentGymError):
    """A checkpoint that does not fit the run that wants to go on from it."""


class SearchTimeout(SearchFailed):
    """No endpoint answered in time."""


class SearchUnavailable(SearchFailed):
    """No endpoint could be reached, or all of them answered with a server error."""


class SearchRefused(SearchFailed):
    """The server will not answer this request, now or later: it is wrong, too large, or not allowed."""


class OutOfMemory(AgentGymError, MemoryError):
    """A phase of a training step that does not fit in memory; the message says which, and what to lower."""


class EngineFailed(AgentGymError):
    """A generation engine that died in the middle of a call; it can be started again, and nothing was played."""


class ServerFailed(AgentGymError):
    """A request that a model's server did not fulfil; the message names the address and what came back."""


class ServerUnavailable(ServerFailed, EngineFailed):
    """A server that cannot be reached, takes too long, or keeps answering that it cannot do it just now.

    pause: seconds that the server asked to be left alone.
    """

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class ContextTooLong(ServerFailed):
    """A request with more tokens than the server's model can take."""
