"""Every error that the stack raises on purpose.

StackError
├── BadInput       400  a value that can never be right; the message names it and what is allowed
│   └── TooManyFailed   more of the rows that a job asks about have failed than may
├── ShieldViolation 400  what a shield found in a request or in an answer; the message names the shield
├── Unauthorized   401  no API key where one is needed, or one that is not known (any more)
├── Forbidden      403  a key that may not do this; the message names the scope that may
├── NotFound       404  an id that is not there (or not yours)
├── Conflict       409  an id that is taken by something else
├── TooLarge       413  a body or file over its bound
├── TooManyRequests 429  more than a tenant may have at once, or than a model's queue holds
├── EngineFailed   500  a model that failed while it answered
├── Diverged       500  a training whose loss is no number any more
├── Unavailable    503  something that will work again; says after how many seconds to retry
│   └── Away            what would answer is not there now, and another is on its way: to wait is worth while
└── StorageFull    507  no room left on the disk
"""


class StackError(Exception):
    """An error with a place in the error envelope.

    `status` is the HTTP status, `type` and `code` are what programs switch on, `param` names the field at fault,
    `retry_after` is in seconds.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    retry_after: int | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after or type(self).retry_after


class BadInput(StackError):
    status = 400
    type = "invalid_request_error"
    code = "bad_input"


class TooManyFailed(BadInput):
    """It is told by the first of the rows."""


class ShieldViolation(StackError):
    status = 400
    type = "invalid_request_error"
    code = "shield_violation"


class Unauthorized(StackError):
    status = 401
    type = "authentication_error"
    code = "unauthorized"


class Forbidden(StackError):
    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(StackError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(StackError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class TooLarge(StackError):
    status = 413
    type = "invalid_request_error"
    code = "too_large"


class TooManyRequests(StackError):
    status = 429
    type = "rate_limit_error"
    code = "too_many_requests"
    retry_after = 30


class EngineFailed(StackError):
    status = 500
    type = "server_error"
    code = "engine_failed"


class Diverged(StackError):
    code = "diverged"


class Unavailable(StackError):
    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after = 5


class Away(Unavailable):
    """Nothing of what was asked has failed for a reason of its own."""


class Superseded(Unavailable):
    """Another process does this work from now on. This one has not begun what was asked."""


class StorageFull(StackError):
    status = 507
    type = "server_error"
    code = "storage_full"
