def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="How often tests/faults/test_kill.py kills each run.")
