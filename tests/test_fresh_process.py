import pytest


def test_the_process_has_not_imported_the_package(run_fresh, tmp_path):
    code = "import sys, pathlib\nprint('transformers' in sys.modules, 'hf_dl' in sys.modules, pathlib.Path.cwd().name)"
    assert run_fresh(code, cwd=tmp_path) == f"True False {tmp_path.name}\n"


def test_jobs_share_no_state_and_report_errors(run_fresh, tmp_path):
    run_fresh("import transformers\ntransformers.left_behind = 1", cwd=tmp_path)
    with pytest.raises(AssertionError, match="AttributeError: .* has no attribute left_behind"):
        run_fresh("import transformers\nprint(transformers.left_behind)", cwd=tmp_path)
    with pytest.raises(AssertionError, match="ModuleNotFoundError: .*hf_dl"):
        run_fresh("import sys\nsys.modules['hf_dl'] = None\nimport hf_dl", cwd=tmp_path)


def test_a_process_with_its_own_variables(start_fresh, tmp_path):
    code = """
import os, sys
print("torch" in sys.modules, {"huggingface_hub", "transformers", "hf_dl"} & set(sys.modules))
print(dict(os.environ), sys.argv[1:], sys.path[1])
sys.exit("the end")
"""
    done = start_fresh(code, "a", "b", cwd=tmp_path, env={"PYTHONPATH": "/here"})
    assert done.stdout.splitlines() == ["True set()", "{'PYTHONPATH': '/here'} ['a', 'b'] /here"]
    assert (done.returncode, done.stderr) == (1, "the end\n")
