"""The routes of the app, whichever driver it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import falcon

from tokenguard.api.admin import AdminRule
from tokenguard.api.budgets import BudgetList, OneBudget
from tokenguard.api.health import Health
from tokenguard.api.metrics import Exposition
from tokenguard.api.openapi import Description
from tokenguard.api.provider_limits import ProviderSync
from tokenguard.api.wire import Resource, Tracing, add_error_handlers
from tokenguard.wiring import House


def furnish(
    house: House, app: falcon.App[Any, Any], over: Callable[[Resource], object], chat: object, models: object
) -> None:
    """Give an app its middleware, its error handlers and its routes.

    Args:
        house: What guards the calls.
        app: The app, of either driver.
        over: Makes a resource ready for the driver.
        chat: The resource of chat completions, which are the driver's own.
        models: Likewise.
    """
    config = house.config
    app.add_middleware([Tracing(house.metrics), AdminRule(config.admin_token, config.admin_allow)])
    add_error_handlers(app)
    app.add_route("/v1/chat/completions", chat)
    app.add_route("/v1/models", models)
    app.add_route("/v1/models/{model:path}", models)
    one = over(OneBudget(house.budgets))
    app.add_route("/config/budget", over(BudgetList(house.budgets)))
    app.add_route("/config/budget/{scope}", one)
    app.add_route("/config/budget/{scope}/{scope_id:path}", one)
    app.add_route("/sync/openai-limits", over(ProviderSync(house.provider_limits)))
    app.add_route("/", over(Health(house.backend, house.provider_limits)))
    app.add_route("/metrics", over(Exposition(house.metrics)))
    app.add_route("/openapi.json", over(Description()))
