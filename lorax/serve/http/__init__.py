"""HTTP in front of an engine: OpenAI's endpoints, adapters by name, keys, limits, figures, a page.

protocol -> guard -> app -> completions | adapters | page      a request's way in
access, gate, body, fields, prompts -> job                      who, how many, what is asked
generation -> answers, stream                                   what comes back
server                                                          the process: start, drain, stop
"""

from lorax.serve.http.app import create_app
from lorax.serve.http.errors import ApiError
from lorax.serve.http.folders import Folders
from lorax.serve.http.forgotten import Forgotten
from lorax.serve.http.keys import Keys
from lorax.serve.http.server import Server, listen
from lorax.serve.http.settings import Settings
from lorax.serve.http.site import Site

__all__ = ["ApiError", "Folders", "Forgotten", "Keys", "Server", "Settings", "Site", "create_app", "listen"]
