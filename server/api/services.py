"""What the routes work with, made once by `server.app` and found on the application's state."""

from dataclasses import dataclass

from fastapi import Request

from model_store.store import Store
from server.api.catalog import Catalog
from server.engine.interface import Engine
from server.jobs import JobRunner
from server.metrics import Metrics
from server.settings import Settings


@dataclass(frozen=True)
class Services:
    settings: Settings
    store: Store
    engine: Engine
    jobs: JobRunner
    catalog: Catalog
    metrics: Metrics


def services_of(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services
