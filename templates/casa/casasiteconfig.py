"""CASA's site configuration for our jobs: no network, no files outside the job, nothing in the user's home directory.

CASA reads it through the environment variable CASASITECONFIG, which has to be an absolute path.
"""

import importlib.util as _util
import os as _os

# The measures tables inside python-casacore (27 MB) spare the download of casadata (349 MB). A CASA without
# python-casacore keeps its own data, and must have them.
_casacore = _util.find_spec("casacore")
if _casacore is not None:
    measurespath = _os.path.join(_os.path.dirname(_casacore.origin), "data")
    datapath = [measurespath]
measures_auto_update = False
data_auto_update = False
# Without a name for the log CASA writes casa-<date>.log into the current directory; "nologfile" does not stop it.
logfile = "/dev/null"
nologger = True
nogui = True
agg = True
casaconfig_verbose = 0
cachedir = _os.environ.get("TMPDIR", "/tmp")
