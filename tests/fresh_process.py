"""Run code in processes that have imported transformers and have not imported hf_dl."""

import json
import subprocess
import sys
from pathlib import Path

# The import of transformers takes seconds. The server does it once; each job runs in a fork of the server.
SERVER = """
import json, os, sys, traceback
import torch, safetensors.torch, transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel, pipeline

assert "hf_dl" not in sys.modules
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(job["cwd"])
        for stream, path in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_RDWR), stream)
        status = 0
        try:
            exec(compile(job["code"], "<job>", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """A process that forks for each job. It starts with the first job."""

    def __init__(self):
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process is not None:
            # Without the signal, the server would wait as long as another process holds a copy of its input.
            self.process.terminate()
            self.process.communicate()

    def run(self, code, *, cwd):
        """Run code in a fork of the server, in the folder `cwd`; returns what it prints."""
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen([sys.executable, "-c", SERVER], **pipes)
        files = {name: str(Path(cwd, f"fresh_{name}.txt")) for name in ("stdout", "stderr")}
        for path in files.values():
            Path(path).write_text("")
        self.process.stdin.write(json.dumps({"code": code, "cwd": str(cwd), **files}) + "\n")
        self.process.stdin.flush()
        status = self.process.stdout.readline().strip()
        assert status == "0", Path(files["stderr"]).read_text()[-3000:]
        return Path(files["stdout"]).read_text()
