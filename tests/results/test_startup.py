"""What commands cost before and after the work itself."""

from rich.console import Console

from results import startup


def test_the_cost_of_every_command_is_measured_beside_the_libraries(monkeypatch, capsys):
    monkeypatch.setattr(startup, "COMMANDS", {"nothing": ["-c", ""], startup.LIBRARIES: ["-c", "b'x' * 2**26"]})
    costs = startup.measure_startup(rounds=1, console=Console(width=200))
    assert costs.keys() == {"nothing", startup.LIBRARIES}
    assert all(cost["seconds"] > 0 and cost["mib"] > 1 for cost in costs.values())
    assert "nothing" in capsys.readouterr().out


def test_every_command_that_is_measured_does_what_its_name_says():
    for name, arguments in startup.COMMANDS.items():
        assert (arguments[0] == "-c") == name.startswith("import ")
