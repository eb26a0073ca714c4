package dataqueue

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// An Error is what a call failed with. It is found with [errors.As].
type Error struct {
	Code codes.Code
	// Reason is the server's, such as JSON_INVALID. Empty: the error is none of the server's refusals.
	Reason string
	// Field is the one that was refused, such as tasks[1].json, if one was.
	Field   string
	Message string
	// RetryAfter is how long the server asks to wait before the call is repeated.
	RetryAfter time.Duration
	cause      error
}

func (e *Error) Error() string {
	var text strings.Builder
	text.WriteString(code.Code(e.Code).String())
	if e.Reason != "" {
		text.WriteString(" " + e.Reason)
	}
	if e.Field != "" {
		text.WriteString(" at " + e.Field)
	}
	return text.String() + ": " + e.Message
}

// Unwrap answers what the error came of.
func (e *Error) Unwrap() error { return e.cause }

// failure reads what a call of gRPC failed with.
func failure(err error) *Error {
	var failed *Error
	if errors.As(err, &failed) {
		return failed
	}
	said := status.Convert(err)
	failed = &Error{Code: said.Code(), Message: said.Message(), cause: err}
	for _, detail := range said.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.Domain == "dataqueue" {
				failed.Reason = detail.Reason
			}
		case *errdetails.BadRequest:
			if len(detail.FieldViolations) > 0 {
				failed.Field = detail.FieldViolations[0].Field
			}
		case *errdetails.RetryInfo:
			failed.RetryAfter = max(detail.RetryDelay.AsDuration(), 0)
		}
	}
	return failed
}

func invalid(field, format string, values ...any) *Error {
	return &Error{Code: codes.InvalidArgument, Field: field, Message: fmt.Sprintf(format, values...)}
}

// passes tells whether the same call may go through later: it failed on its way, or the server says so.
func (e *Error) passes() bool {
	switch e.Code {
	case codes.Unavailable, codes.DeadlineExceeded:
		return true
	case codes.ResourceExhausted:
		return e.RetryAfter > 0
	case codes.Internal, codes.Unknown, codes.Canceled:
		return e.Reason == ""
	default:
		return false
	}
}

type rejection struct{ err error }

func (r *rejection) Error() string { return r.err.Error() }

func (r *rejection) Unwrap() error { return r.err }

// Reject marks a handler's error as one that trying again does not help against: the task becomes a dead letter at once. The error's
// text is the reason that is kept with it.
func Reject(err error) error {
	if err == nil {
		err = errors.New("rejected")
	}
	return &rejection{err}
}
