/* parcel.h: Lua values on their way from one state to another, on another thread: tensors, numbers, strings, booleans,
 * nil, and tables of these. A tensor is the same storage at both ends, strings and tables are copies. */
#ifndef OREPA_PARCEL_H
#define OREPA_PARCEL_H

#include "bind.h"

typedef struct parcel parcel;

/* The values from `first` to the top. NULL: one can't cross, and the message for orepa_error says which. Raises no
 * error of Lua's. */
parcel *parcel_pack(lua_State *L, int first);
/* Pushes the values; how many. May raise an error, and the parcel stays the caller's. */
int parcel_unpack(lua_State *L, const parcel *p);
void parcel_free(parcel *p);

/* A userdata that frees the parcel in it when it dies; empty at first. */
parcel **parcel_push_holder(lua_State *L);
void bind_parcel_type(lua_State *L);

#endif
