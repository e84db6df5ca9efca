"""Settings: the one typed, frozen object for every number and address a person may change.

Read from the environment (`RAPPORT_HOME`, `RAPPORT_TRAINING__TRIALS`, ...) once, at an entry point, and passed
down. Hyper-parameters and search spaces are not here: they stay with their model.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

# Several of the libraries call home unless told otherwise; "true" is the literal that all of them understand.
QUIET_ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "BENTOML_DO_NOT_TRACK": "true",
    "FEAST_USAGE": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "OPENBLAS_NUM_THREADS": "1",
}


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class IngestSettings(_Group):
    """What an event must satisfy to be accepted."""

    batch_rows: int = Field(250_000, ge=1_000, description="rows of a file held in memory at a time")
    session_gap_minutes: int = Field(30, ge=1, le=1_440, description="silence that ends a session")
    max_future_minutes: int = Field(60, ge=0, description="an event may lie this far after its arrival, else it is refused")
    max_age_days: int = Field(3_650, ge=1, description="an event may lie this far before its arrival, else it is refused")
    outlier_z: float = Field(6.0, gt=0, description="robust z-score of log revenue beyond which a row is flagged")
    outlier_iqr: float = Field(6.0, gt=0, description="interquartile ranges beyond the quartiles after which a row is flagged")
    near_duplicate_s: float = Field(
        1.0, ge=0, le=3_600, description="same customer, type and item within this many seconds: flagged; 0: off"
    )
    anomaly_weeks: int = Field(4, ge=1, le=52, description="weeks of the same hour that an hour's volume and nulls are held against")
    anomaly_z: float = Field(6.0, gt=0, description="robust z-score of an hour's volume or null rate that raises an alert")
    trait_sources: tuple[str, ...] = Field(
        (), description="sources in the order they are believed where traits conflict; the rest by recency"
    )
    imputation: dict[str, Literal["median", "mode", "model"]] = Field(
        {}, description="traits that are filled where nothing is known of them -> how; none: they stay null"
    )
    unmatched_returns: Literal["flag", "refuse"] = Field(
        "flag", description="what becomes of a return of which no purchase is known; it may lie before the log"
    )
    return_tolerance_days: int = Field(
        90, ge=0, description="so soon after its source's first purchase a return may be of one before the log"
    )


class CollectSettings(_Group):
    """What the collector takes, and how much of it."""

    max_event_bytes: int = Field(32 * 1024, ge=1_024, description="a larger event is refused (Segment's limit)")
    max_batch_bytes: int = Field(500 * 1024, ge=1_024, description="a larger body is refused (Segment's limit); also once unpacked")
    max_batch_events: int = Field(2_500, ge=1, description="events in one batch")
    max_depth: int = Field(32, ge=4, le=200, description="nesting of an event")
    group_events: int = Field(1_000, ge=1, le=10_000, description="events in one commit; more bring latency and hardly any speed")
    queue_events: int = Field(20_000, ge=1_000, description="events waiting for a commit; beyond it 503")
    rate_per_s: float = Field(50_000, gt=0, description="events a second that one source may send for long")
    burst: int = Field(100_000, ge=1, description="events that a source may send at once")
    origins: tuple[str, ...] = Field((), description="web origins that browsers may send from (CORS); '*': any")
    segment_hours: int = Field(24, ge=1, description="a part of the log is closed after this long, so that retention unlinks whole files")


class EdgeSettings(_Group):
    """Brokers that events may come from. None: not used."""

    redis_url: SecretStr | None = Field(None, description="redis://...: a stream is read")
    kafka_servers: str | None = Field(None, description="host:port,host:port")
    kafka_security: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field("PLAINTEXT", description="as the brokers' listener")
    kafka_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field("PLAIN", description="of SASL")
    kafka_user: str | None = Field(None, description="of SASL")
    kafka_password: SecretStr | None = Field(None, description="of SASL")
    rabbitmq_url: SecretStr | None = Field(None, description="amqp://...: a quorum queue is read")
    name: str = Field("rapport-events", min_length=1, description="the stream, topic or queue")
    group: str = Field("rapport", min_length=1, description="the consumer group")
    batch_events: int = Field(500, ge=1, le=10_000, description="events asked of the broker at once")
    max_tries: int = Field(5, ge=1, le=100, description="deliveries of an event before it is set aside")
    takeover_s: float = Field(5.0, gt=0, le=60, description="silence of a consumer after which others take its work")


class ConsentSettings(_Group):
    """What personal data may be used for."""

    purpose: str = Field("personalization", description="the purpose that features, training and personal answers need")
    purposes: tuple[str, ...] = Field(
        ("analytics", "personalization", "marketing"),
        description="purposes that statements may name; others are kept, but allow nothing",
    )
    stored_for: tuple[str, ...] = Field(("personalization",), description="an event is stored if one of these purposes is allowed")
    policy_version: str = Field("1", description="of the privacy notice in force, for statements that name none")
    legal_basis: str | None = Field(None, description="declared basis for sources that carry no consent; none: fail closed")
    wait_hours: int = Field(24, ge=0, description="hours after its receipt in which a late word may still let a logged event in")

    @model_validator(mode="after")
    def _purposes_are_known(self) -> "ConsentSettings":
        unknown = {self.purpose, *self.stored_for} - set(self.purposes)
        if unknown or not self.stored_for:
            raise ValueError(
                f"expected purpose and stored_for to name some of {', '.join(self.purposes)}; found {', '.join(unknown) or 'none'}"
            )
        return self


class PrivacySettings(_Group):
    """How long things are kept, and how much may be told of everybody."""

    retention_days: dict[str, int] = Field({}, description="by event type, or '*': days after which events are removed; none: kept")
    log_retention_days: int = Field(30, ge=1, description="days that the raw log keeps what was applied")
    epsilon_total: float = Field(10.0, gt=0, description="privacy budget of all published aggregates together")


class LabelSettings(_Group):
    """Cut-offs, gaps, horizons, and what a split needs."""

    churn_event: str = Field("purchase", description="the event whose absence is churn")
    churn_horizon_days: int | None = Field(
        28, ge=1, description="silence after the cut-off that counts as churn; auto: chosen from how long customers take to come back"
    )
    churn_return_share: float = Field(
        0.85, gt=0.5, lt=1, description="of customers who come back, the share that does so within a horizon chosen from the data"
    )
    churn_gap_days: int = Field(0, ge=0, description="days between cut-off and horizon, the time needed to act")
    churn_active_days: int = Field(84, ge=1, description="a customer is in the population if active this recently")
    churn_cutoffs: int = Field(
        12, ge=1, le=52, description="training cut-offs before the validation one, as many of them as the log allows"
    )
    intent_points: tuple[int, ...] = Field((1, 3, 6, 10), description="decision points: after the n-th event of a session")
    intent_test_share: float = Field(0.2, gt=0, lt=0.5, description="newest share of the log's time kept for the test")
    ranking_horizon_days: int = Field(28, ge=1, description="purchases in this window after the cut-off are relevant")
    min_rows: int = Field(100, ge=10, description="rows that a split needs, else the model is not trainable")
    min_class_rows: int = Field(20, ge=5, description="rows of each class that a split needs")

    @field_validator("churn_horizon_days", mode="before")
    @classmethod
    def _auto_is_none(cls, value: object) -> object:
        return None if value == "auto" else value


class TrainingSettings(_Group):
    """How models are tuned, fitted and compared."""

    trials: int = Field(12, ge=1, description="Optuna trials per model")
    timeout_s: float | None = Field(None, gt=0, description="stop tuning a model after this long")
    workers: int = Field(1, ge=1, le=64, description="processes that try parameters, one thread each; another number, another search")
    study_url: SecretStr | None = Field(
        None, description="postgresql+pg8000://...: trials are kept there, for workers of several machines; none: in a file of the home"
    )
    tracking_url: SecretStr | None = Field(
        None, description="postgresql+pg8000://...: MLflow's runs and registry are kept there, in another database; none: in the home"
    )
    heartbeat_s: int = Field(10, ge=1, le=600, description="between two signs of life of a worker on such a server; after three it is dead")
    seed: int = Field(7, ge=0, description="one seed for tuning, fitting and bootstrap")
    k: int = Field(20, ge=1, le=200, description="length of the list that ranking metrics look at")
    cost_false_positive: float = Field(1.0, gt=0, description="cost of acting on a customer who needed nothing")
    cost_false_negative: float = Field(4.0, gt=0, description="cost of missing a customer who did")
    bootstrap_draws: int = Field(500, ge=100, description="draws behind every interval")
    folds: int = Field(2, ge=1, le=8, description="origins that a trial is judged at, the validation rows and as many earlier ones as fit")
    ranking_cutoffs: int = Field(6, ge=1, le=24, description="earlier cut-offs, and visits after them, that the second stage learns from")
    seeds: int = Field(3, ge=1, le=20, description="boosters of the winner's parameters that are averaged into the model")
    when_days: int | None = Field(
        None, ge=1, le=730, description="days ahead that churn also tells when the next order comes, by a hazard model; none: it does not"
    )

    value_days: int | None = Field(
        None, ge=1, le=3_650, description="days ahead that churn also tells what each customer will be worth; none: it does not"
    )

    @model_validator(mode="after")
    def _databases_differ(self) -> "TrainingSettings":
        if self.study_url is not None and self.study_url == self.tracking_url:
            raise ValueError("expected study_url and tracking_url to name two databases, since the tables of each are in the other's way")
        return self


class GateSettings(_Group):
    """What a new version must hold, on the test rows, to take the place of the champion."""

    tolerated_loss: float = Field(0.01, ge=0, le=1, description="of the metric that a model of newer data may lose")
    group_loss: float = Field(0.03, ge=0, le=1, description="of the metric that a protected group may lose")
    max_ece: float = Field(0.05, gt=0, le=1, description="calibration error; more is allowed where the champion's is no smaller")
    max_row_ms: float = Field(5.0, gt=0, description="median time to score one row")
    coverage_loss: float = Field(0.2, ge=0, le=1, description="of the share of the catalogue that the champion's lists show")
    max_list_ms: float = Field(20.0, gt=0, description="median time to rank the catalogue for one customer")
    min_stability: float = Field(
        0.75, ge=0, le=1, description="Jaccard of the least stable segment; less where the champion's is no larger"
    )
    min_kept: float = Field(0.5, ge=0, le=1, description="share of customers who stay in a segment of the same name")


class OnlineSettings(_Group):
    """Where the latest feature values are kept for serving."""

    redis_url: SecretStr | None = Field(None, description="redis://...: features are kept there; none: in a SQLite file of the home")


class StreamSettings(_Group):
    """The worker that keeps the online store fresh, event by event."""

    workers: int = Field(1, ge=1, le=16, description="processes; each reads the whole log and writes its share of the customers")
    customers: int = Field(10_000, ge=1_000, description="customers held ready in memory; rows of the others are read anew")
    items: int = Field(20_000, ge=1_000, description="items held ready in memory; rows of the others are read anew")


class ServingSettings(_Group):
    """Where and how the service answers."""

    host: str = Field("127.0.0.1", description="address the service listens on")
    port: int = Field(3000, ge=0, le=65_535, description="port the service listens on; 0 picks a free one")
    workers: int = Field(1, ge=1, le=64, description="processes")
    deadline_ms: int = Field(250, ge=5, le=10_000, description="time within which every valid request is answered")
    max_body_bytes: int = Field(64 * 1024, ge=1_024, description="larger request bodies get 413")
    rate_per_s: float = Field(10_000, gt=0, description="requests a second that one key may make for long; beyond it 429")
    burst: int = Field(20_000, ge=1, description="requests that a key may make at once")
    tls_cert: Path | None = Field(None, description="PEM file of the certificate and its chain: the service speaks https; none: http")
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    ranking_s: float = Field(
        5.0, ge=0, le=60, description="seconds for which a customer's order of items stands while nothing new is known of them; 0: none"
    )
    max_feature_age_hours: int = Field(24 * 3650, ge=1, description="older online rows count as missing")
    audit_share: float = Field(
        0.01, ge=0, le=1, description="share of customers whose served values are kept for `features parity`; 0: none"
    )
    audit_days: int = Field(30, ge=1, description="days that they are kept")
    audit_rows: int = Field(100_000, ge=1, description="rows that are kept; the oldest go first")
    log_format: Literal["json", "text"] = Field("json", description="of the service's lines on stderr, and of those who work beside it")
    log_requests: Literal["none", "notable", "all"] = Field(
        "notable", description="requests that get a line: none, those refused, failed, degraded or slow, or all of them"
    )
    log_slow_ms: float = Field(250, gt=0, description="a request that takes longer is notable")
    log_per_s: int = Field(20, ge=1, description="lines about requests that a worker writes a second; the rest is counted in the next one")
    otlp_endpoint: str | None = Field(
        None, pattern=r"^https?://[^/\s]", description="http://collector:4318/v1/traces: requests with a sampled traceparent are told there"
    )
    otlp_headers: dict[str, SecretStr] = Field({}, description="sent along with them, such as a key of the collector")

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "ServingSettings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("expected both tls_cert and tls_key, or neither; found one of them")
        return self


class MonitoringSettings(_Group):
    """What counts as drift and as a gap between groups."""

    protected: tuple[str, ...] = Field(("age_band", "region", "gender"), description="columns that groups are formed by")
    sample_rows: int = Field(10_000, ge=1_000, description="rows of either side that Evidently draws")
    min_window_rows: int = Field(500, ge=100, description="a smaller window is not judged")
    psi_limit: float = Field(0.1, gt=0, description="population stability index that counts as drift")
    w1_limit: float = Field(0.1, gt=0, description="Wasserstein distance in reference standard deviations that counts as drift")
    null_limit: float = Field(0.05, gt=0, le=1, description="change in the share of nulls that counts as drift")
    min_group: int = Field(200, ge=30, description="a smaller group is reported as not enough data")
    min_group_positives: int = Field(30, ge=5, description="positives that a true-positive rate needs")
    tolerated_gap: float = Field(0.1, gt=0, lt=1, description="a gap between groups is an alarm when its interval lies beyond")


class SimulationSettings(_Group):
    """The simulated shop."""

    customers: int = Field(2_500, ge=20, le=5_000_000, description="people in the simulated shop")
    days: int = Field(182, ge=14, le=3_650, description="length of the simulated log")
    seed: int = Field(7, ge=0, description="same seed, same shop")


class Settings(BaseSettings):
    """Everything a person may change. Frozen; `Settings()` is called at entry points only."""

    model_config = SettingsConfigDict(env_prefix="RAPPORT_", env_nested_delimiter="__", frozen=True, extra="ignore")

    home: Path = Field(Path(".rapport"), description="folder that holds everything a run writes")
    profile: Literal["embedded"] = Field("embedded", description="embedded: SQLite, DuckDB and files; no server")
    as_of: datetime | None = Field(None, description="what 'now' is; none: the log decides (see `clock`)")
    collect_key: SecretStr | None = Field(None, description="key of the role collect; none: generated into the home folder")
    decide_key: SecretStr | None = Field(None, description="key of the role decide")
    admin_key: SecretStr | None = Field(None, description="key of the role admin")
    sources: dict[str, SecretStr] = Field({}, description="write keys of further sources, by their names; collect_key is that of `segment`")
    master_key: SecretStr | None = Field(None, description="wraps the keys of all people; none: generated into the home folder")
    next_master_key: SecretStr | None = Field(None, description="what `rapport rotate-key` puts in the place of `master_key`")
    ingest: IngestSettings = IngestSettings()
    collect: CollectSettings = CollectSettings()
    edges: EdgeSettings = EdgeSettings()
    consent: ConsentSettings = ConsentSettings()
    privacy: PrivacySettings = PrivacySettings()
    labels: LabelSettings = LabelSettings()
    training: TrainingSettings = TrainingSettings()
    gate: GateSettings = GateSettings()
    online: OnlineSettings = OnlineSettings()
    stream: StreamSettings = StreamSettings()
    serving: ServingSettings = ServingSettings()
    monitoring: MonitoringSettings = MonitoringSettings()
    simulation: SimulationSettings = SimulationSettings()

    @field_validator("home", mode="before")
    @classmethod
    def _is_named(cls, home: object) -> object:
        if home == "":  # a variable that was not set: it would be the current folder
            raise ValueError("expected a folder")
        return home


def silence_telemetry() -> None:
    """Switch off the telemetry of every dependency. Entry points call it before they import anything heavy."""
    os.environ.update(QUIET_ENVIRONMENT)


def clock(settings: Settings, last_event: datetime | None, wall: datetime) -> datetime:
    """What "now" means, UTC: the setting if given, else the wall clock for a live log, else the log's last event.

    A log whose newest event is more than a day old is history: served "now", its windows would all be empty.
    """
    if settings.as_of is not None:
        return settings.as_of.astimezone(UTC)
    if last_event is None or (wall - last_event).total_seconds() < 86_400:
        return wall
    return last_event
