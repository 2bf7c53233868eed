/* bind.h: what all bindings share. A tensor in Lua is a userdata that holds one reference; a binding makes the userdata
 * first and fills it second, so that an error in between leaks nothing.
 *
 * Each family of functions is one table of rows: name, function, documentation. The documentation's first line is the
 * signature; lines that start with "> " are an example, which a test runs. */
#ifndef OREPA_BIND_H
#define OREPA_BIND_H

#include <lauxlib.h>
#include <lua.h>

#include "orepa.h"

typedef struct {
  const char *name;
  lua_CFunction function;
  const char *documentation;
} bind_row;

/* Adds the rows to the table on top of the stack, and their documentation under `prefix` ("F." and the like). */
void bind_register(lua_State *L, const char *prefix, const bind_row *rows);
void bind_document(lua_State *L, const char *name, const char *documentation);
/* Makes the metatable of a userdata that Lua code only holds: `method` ("__gc" or "__close") is called at its end. */
void bind_end_with(lua_State *L, const char *type, const char *method, lua_CFunction function);

/* ---- errors: raised at the user's line, which is the innermost one outside the library */
int bind_error(lua_State *L, const char *format, ...);
int bind_fail(lua_State *L); /* with the engine's message */

/* ---- tensors */
#define BIND_TENSOR "orepa.Tensor"
orepa_tensor *bind_tensor(lua_State *L, int index);        /* an error if it is no tensor, or one that was released */
orepa_tensor *bind_tensor_or_nil(lua_State *L, int index); /* NULL for nil and none */
orepa_tensor *bind_test_tensor(lua_State *L, int index);   /* NULL for anything else */
orepa_tensor **bind_new(lua_State *L);                     /* pushes an empty handle */
void bind_push(lua_State *L, orepa_tensor *t);             /* pushes a handle with a new reference; nil for NULL */

/* Collects garbage if the engine's live bytes have grown so far that dead handles probably hold them. */
void bind_collect(lua_State *L);
/* For tests: with OREPA_STRESS=gc in the environment the former collects each time, with OREPA_STRESS=generational
 * Lua's collector works by generations. */
void bind_stress(lua_State *L);
/* Collects if that costs little beside the work that the engine's live bytes stand for. */
void bind_tidy(lua_State *L);
/* After a failed call: whether memory ran out and garbage was collected, so that it is worth trying again. */
bool bind_retry(lua_State *L);

/* ---- traces: a binding's work on the engine is an event under the name of the function that Lua called */
/* Gives the function on top of the stack its name in traces. */
void bind_name(lua_State *L, const char *name);
/* An event, or -1 while nothing is traced. The result may be NULL. */
int64_t bind_begin_op(lua_State *L);
void bind_end_op(int64_t event, const orepa_tensor *result);

/* Returns the tensor that `call` makes, one retry included: the last statement of a binding. */
#define BIND_RETURN(L, call)                                                                                           \
  do {                                                                                                                 \
    bind_collect(L);                                                                                                   \
    orepa_tensor **handle = bind_new(L);                                                                               \
    int64_t op_event = bind_begin_op(L);                                                                               \
    *handle = (call);                                                                                                  \
    if (!*handle && bind_retry(L))                                                                                     \
      *handle = (call);                                                                                                \
    bind_end_op(op_event, *handle);                                                                                    \
    return *handle ? 1 : bind_fail(L);                                                                                 \
  } while (0)

/* Lets the engine know where the user's program is, if anomalies are looked for; bind_collect does that too. */
void bind_note_place(lua_State *L);

/* Returns the first argument after `call`, which gives 0 or -1. */
#define BIND_RETURN_SELF(L, call)                                                                                      \
  do {                                                                                                                 \
    bind_collect(L);                                                                                                   \
    int64_t op_event = bind_begin_op(L);                                                                               \
    bool op_failed = (call) && (!bind_retry(L) || (call));                                                             \
    bind_end_op(op_event, NULL);                                                                                       \
    if (op_failed)                                                                                                     \
      return bind_fail(L);                                                                                             \
    lua_settop(L, 1);                                                                                                  \
    return 1;                                                                                                          \
  } while (0)

/* ---- callbacks: what the engine calls in Lua during a backward pass */
/* Calls f, which gets `argument` as a light userdata, on the Lua state that called backward. 0, or -1; the error that f
 * raised then goes on where backward was called. */
int bind_call_back(lua_CFunction f, void *argument);
/* A registry reference that is given up where no Lua state is at hand: the head of a block of malloc's, which is freed.
 */
typedef struct bind_reference {
  int reference;
  struct bind_reference *next;
} bind_reference;
void bind_give_up(bind_reference *r);
/* Now; for the bindings that may have freed a graph. */
void bind_give_up_now(lua_State *L);

/* ---- arguments */
/* Whether the value is a table whose keys are all strings. Mixed keys are an error; an empty table is a shape if it is
 * the first argument, else options. */
bool bind_is_options(lua_State *L, int index);
/* Checks that no key but these (ended by NULL) is in the options at `index`; none and nil are empty. Returns the index
 * or 0. */
int bind_options(lua_State *L, int index, const char *function, const char *const *known);
bool bind_option(lua_State *L, int options, const char *name); /* pushes the value unless it is nil or absent */
double bind_option_number(lua_State *L, int options, const char *name, double otherwise);
int64_t bind_option_integer(lua_State *L, int options, const char *name, int64_t otherwise);
bool bind_option_boolean(lua_State *L, int options, const char *name, bool otherwise);
/* A number or {height, width}. */
void bind_option_pair(lua_State *L, int options, const char *name, const int64_t otherwise[2], int64_t pair[2]);

/* {stride=, padding=, dilation=, groups=} */
orepa_conv bind_conv_options(lua_State *L, int index, const char *function);

int64_t bind_integer(lua_State *L, int index, const char *what); /* integral floats too */
/* Dimensions, given from 1 or from the end as -1, counted from 0. */
int bind_axis(lua_State *L, int index, int rank, const char *function);
/* A shape: a list at `index`, or numbers from there on to `last`. Returns the rank. */
int bind_shape(lua_State *L, int index, int last, int64_t *shape, bool allow_unknown);
/* {dtype=, device=} at `index` if there is one; otherwise the defaults: float32 on cpu. */
typedef struct {
  orepa_dtype dtype;
  const orepa_device *device;
  bool typed; /* a type was named */
} bind_kind;
bind_kind bind_kind_option(lua_State *L, int index, const char *function);
orepa_dtype bind_dtype(lua_State *L, const char *name);
const orepa_device *bind_device(lua_State *L, const char *name);

/* The number there; an error otherwise. */
orepa_operand bind_number(lua_State *L, int index);
/* An operand of an element-wise function: a tensor or a number. */
orepa_operand bind_operand(lua_State *L, int index);
/* The tensor there, or a scalar like `t` of the number there, which is pushed. */
orepa_tensor *bind_tensor_or_scalar(lua_State *L, int index, const orepa_tensor *t);

/* ---- the families: each adds its functions to the module table on top of the stack, and its methods to Tensor's */
void bind_tensor_family(lua_State *L);
void bind_view_family(lua_State *L);
void bind_index_family(lua_State *L);
void bind_elementwise_family(lua_State *L);
void bind_functional_family(lua_State *L);
void bind_autograd_family(lua_State *L);
void bind_checkpoint_family(lua_State *L);
void bind_hook_family(lua_State *L);
void bind_function_family(lua_State *L);
void bind_system_family(lua_State *L);
void bind_interrupt_family(lua_State *L);
void bind_optimizer_family(lua_State *L);
void bind_file_family(lua_State *L);
void bind_data_family(lua_State *L);
void bind_image_family(lua_State *L);
void bind_loader_family(lua_State *L);
void bind_reparam_family(lua_State *L);
void bind_trace_family(lua_State *L);

/* Pushes the table whose functions get and set are what t[key] does of a list or a tensor: orepa/indexing.lua. */
void bind_push_indexing(lua_State *L);
/* Pushes the table of Tensor's methods. */
void bind_push_methods(lua_State *L);

#endif
