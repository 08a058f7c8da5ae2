"""When jax is told to leave the TPU alone."""

import pytest

from kernels_pallas import without_tpu


@pytest.mark.parametrize(
    ("libtpu", "files", "plugins", "given", "wanted"),
    [
        (True, [], False, None, "cpu"),
        (True, [], False, "tpu", "tpu"),
        (True, [], False, "", ""),
        (True, ["accel0"], False, None, None),
        (True, ["vfio/0"], False, None, None),
        (True, [], True, None, None),
        (False, [], False, None, None),
    ],
)
def test_the_cpu_is_named_only_where_nothing_else_can_be_meant(
    libtpu, files, plugins, given, wanted, tmp_path, monkeypatch
):
    installed = {"libtpu": libtpu, "jax_plugins": plugins}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed[name] or None)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    environment = {} if given is None else {"JAX_PLATFORMS": given}
    without_tpu.choose_cpu(environment, tmp_path)
    assert environment.get("JAX_PLATFORMS") == wanted
