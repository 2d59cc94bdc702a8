"""Run code in processes that have imported torch, or also transformers, and have not imported hf_dl."""

import json
import subprocess
import sys
from pathlib import Path

# The imports take seconds. The server does them once; each job runs in a fork of the server.
SERVER = """
import gc, json, os, sys, traceback
import torch, torchvision, safetensors.torch, scipy.optimize, pandas, pyarrow.parquet

TRANSFORMERS = '''
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel, pipeline
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
get_checkpoint_conversion_mapping("vit")  # prepares patterns that each call of `from_pretrained` needs
'''

def execute(job):
    sys.argv[1:] = job["argv"]
    if job["env"] is not None:
        os.environ.clear()
        os.environ.update(job["env"])
        sys.path[1:1] = filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep))
    exec(compile(job["code"], "<job>", "exec"), {"__name__": "__main__"})

def run(job):
    child = os.fork()
    if not child:
        os.chdir(job["cwd"])
        for stream, path in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_RDWR), stream)
        status = 0
        try:
            execute(job)
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def serve(lines, answers):
    assert "hf_dl" not in sys.modules
    gc.freeze()  # in a fork, a collection would copy all objects
    for line in lines:
        print(run(json.loads(line)), file=answers, flush=True)

def start_second():
    jobs, answers = os.pipe(), os.pipe()
    if not os.fork():
        for end in (0, jobs[1], answers[0]):
            os.close(end)
        exec(TRANSFORMERS)
        serve(os.fdopen(jobs[0]), os.fdopen(answers[1], "w"))
        os._exit(0)
    os.close(jobs[0])
    os.close(answers[1])
    return os.fdopen(jobs[1], "w"), os.fdopen(answers[0])

assert not {"hf_dl", "huggingface_hub", "transformers"} & set(sys.modules)
gc.freeze()
second = None
for line in sys.stdin:
    if line == "end\\n":
        break
    if json.loads(line)["transformers"]:
        second = second or start_second()
        print(line, end="", file=second[0], flush=True)
        print(second[1].readline(), end="", flush=True)
    else:
        print(run(json.loads(line)), flush=True)
if second:
    second[0].close()
    os.wait()
"""


class Server:
    """A process that forks for each job. It starts with the first job."""

    def __init__(self):
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process is not None:
            # The end of its input would not reach it as long as another process holds a copy of the pipe.
            self.process.communicate("end\n")

    def start(self, code, *argv, cwd, env=None, transformers=False):
        """Run code in a fork of the server, in the folder `cwd`; returns a `subprocess.CompletedProcess`.

        With `env`, the process has these environment variables. It has imported torch, but no library that reads the
        variables of the Hub, unless `transformers` is true.
        """
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen([sys.executable, "-c", SERVER], **pipes)
        files = {name: str(Path(cwd, f"fresh_{name}.txt")) for name in ("stdout", "stderr")}
        for path in files.values():
            Path(path).write_text("")
        job = {"code": code, "argv": argv, "cwd": str(cwd), "env": env, "transformers": transformers, **files}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(argv, status, *(Path(path).read_text() for path in files.values()))

    def run(self, code, *, cwd):
        """Run code in a process that has imported transformers, in the folder `cwd`; returns what it prints."""
        done = self.start(code, cwd=cwd, transformers=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
