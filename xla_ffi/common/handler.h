// FFI handlers out of which no exception gets: not every XLA, which calls them, catches one.
#pragma once

#include <exception>
#include <new>

#include "xla/ffi/api/ffi.h"

namespace df11 {

// An error for XLA. Allocates nothing here: there may be no memory.
inline XLA_FFI_Error* make_error(const XLA_FFI_Api* api, XLA_FFI_Error_Code code,
                                 const char* message) {
  XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message, code};
  return api->XLA_FFI_Error_Create(&args);
}

// Calls a handler, and returns what it throws as an error.
inline XLA_FFI_Error* call_handler(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame,
                                   const char* out_of_memory) {
  try {
    return handler(frame);
  } catch (const std::bad_alloc&) {
    return make_error(frame->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, out_of_memory);
  } catch (const std::exception& error) {
    return make_error(frame->api, XLA_FFI_Error_Code_INTERNAL, error.what());
  }
}

}  // namespace df11

// XLA_FFI_DEFINE_HANDLER_SYMBOL, without exceptions.
#define DF11_DEFINE_HANDLER_SYMBOL(fn, impl, ...)                                 \
  extern "C" XLA_FFI_Error* fn(XLA_FFI_CallFrame* frame) {                        \
    XLA_FFI_DEFINE_HANDLER(handler, impl, __VA_ARGS__);                           \
    return df11::call_handler(handler, frame, #fn ": the host is out of memory"); \
  }
