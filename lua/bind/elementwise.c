/* elementwise.c: the element-wise functions of the engine's list, operators, reductions and matrix products. */
#include <string.h>

#include "bind.h"

/* ---- functions: one closure each, out of place (t:exp()) and in place (t:exp_()) ---- */

static void operands_of(lua_State *L, orepa_function f, orepa_operand *operands) {
  int arity = orepa_function_arity(f);
  if (lua_gettop(L) != arity)
    bind_error(L, "%s: %d operands expected, got %d", orepa_function_name(f), arity, lua_gettop(L));
  for (int k = 0; k < arity; k++)
    operands[k] = bind_operand(L, k + 1);
}

static int apply(lua_State *L, orepa_function f) {
  orepa_operand operands[3];
  operands_of(L, f, operands);
  BIND_RETURN(L, orepa_apply(f, operands));
}

static int l_apply(lua_State *L) {
  return apply(L, (orepa_function)lua_tointeger(L, lua_upvalueindex(1)));
}

static int l_apply_in_place(lua_State *L) {
  orepa_function f = (orepa_function)lua_tointeger(L, lua_upvalueindex(1));
  orepa_operand operands[3];
  operands_of(L, f, operands);
  BIND_RETURN_SELF(L, orepa_apply_in_place(f, operands));
}

/* Lua calls operators of one operand, as __unm, with it twice. */
static int l_apply_to_one(lua_State *L) {
  lua_settop(L, 1);
  return l_apply(L);
}

static const struct {
  const char *function, *metamethod, *text;
} documents[] = {
    {"add", "__add", "t:add(other) -> tensor, t + other\nThe sum, with broadcasting.\n> orepa.ones(2) + 1"},
    {"sub", "__sub", "t:sub(other) -> tensor, t - other\nThe difference.\n> 1 - orepa.ones(2)"},
    {"mul", "__mul", "t:mul(other) -> tensor, t * other\nThe product, element by element.\n> orepa.ones(2) * 3"},
    {"div", "__div",
     "t:div(other) -> tensor, t / other\nThe quotient; of integers too it is float32.\n> orepa.ones(2) / 4"},
    {"pow", "__pow", "t:pow(other) -> tensor, t ^ other\nThe power.\n> orepa.arange(3) ^ 2"},
    {"neg", "__unm", "t:neg() -> tensor, -t\nThe negative.\n> -orepa.ones(2)"},
    {"maximum", NULL, "t:maximum(other) -> tensor\nThe larger of both; NaN wins.\n> orepa.arange(3):maximum(2)"},
    {"minimum", NULL, "t:minimum(other) -> tensor\nThe smaller of both; NaN wins.\n> orepa.arange(3):minimum(2)"},
    {"abs", NULL, "t:abs() -> tensor\nThe magnitude.\n> orepa.tensor({-1, 2}):abs()"},
    {"sign", NULL, "t:sign() -> tensor\n1, 0 or -1; NaN stays.\n> orepa.tensor({-3, 0, 2}):sign()"},
    {"floor", NULL,
     "t:floor() -> tensor\nThe largest whole number not above each element.\n> orepa.tensor({-1.5, 2}):floor()"},
    {"ceil", NULL,
     "t:ceil() -> tensor\nThe smallest whole number not below each element.\n> orepa.tensor({-1.5, 2}):ceil()"},
    {"round", NULL,
     "t:round() -> tensor\nThe nearest whole number, the even one of two.\n> orepa.tensor({0.5, 1.5}):round()"},
    {"floor_divide", "__idiv",
     "t:floor_divide(other) -> tensor, t // other\nThe quotient rounded down; 0 where an integer is divided by 0.\n"
     "> orepa.tensor({-7, 7}) // 2"},
    {"remainder", "__mod",
     "t:remainder(other) -> tensor, t % other\nWhat t // other leaves, with the sign of `other`; 0 where an integer is "
     "divided by 0.\n> orepa.tensor({-7, 7}) % 4"},
    {"sin", NULL, "t:sin() -> tensor\nThe sine of radians.\n> orepa.arange(3):sin()"},
    {"cos", NULL, "t:cos() -> tensor\nThe cosine of radians.\n> orepa.arange(3):cos()"},
    {"sqrt", NULL, "t:sqrt() -> tensor\nThe square root.\n> orepa.arange(3):sqrt()"},
    {"exp", NULL, "t:exp() -> tensor\ne to the power of each element.\n> orepa.zeros(2):exp()"},
    {"log", NULL, "t:log() -> tensor\nThe natural logarithm.\n> orepa.ones(2):log()"},
    {"sigmoid", NULL, "t:sigmoid() -> tensor\n1 / (1 + exp(-t)).\n> orepa.zeros(2):sigmoid()"},
    {"tanh", NULL, "t:tanh() -> tensor\nThe hyperbolic tangent.\n> orepa.arange(3):tanh()"},
    {"softplus", NULL,
     "t:softplus() -> tensor\nlog(1 + exp(t)), which doesn't overflow.\n> orepa.tensor({-1, 1000}):softplus()"},
    {"silu", NULL, "t:silu() -> tensor\nt * sigmoid(t), also called swish.\n> orepa.tensor({-1, 2}):silu()"},
    {"gelu", NULL,
     "t:gelu() -> tensor\nt times the chance that a normal number is less than t: t * (1 + erf(t / sqrt(2))) / 2.\n"
     "> orepa.tensor({-1, 2}):gelu()"},
    {"hardswish", NULL,
     "t:hardswish() -> tensor\nt * clamp(t + 3, 0, 6) / 6, which is much like silu.\n"
     "> orepa.tensor({-4, 1}):hardswish()"},
    {"leaky_relu", NULL,
     "t:leaky_relu(slope) -> tensor\nNegative elements are multiplied by a slope: a number, or a tensor, which then "
     "has a "
     "gradient too.\n> orepa.tensor({-1, 2}):leaky_relu(0.01)"},
    {"xlogy", NULL,
     "t:xlogy(other) -> tensor\nt * log(other), 0 where t is 0.\n> orepa.tensor({0, 2}):xlogy(orepa.tensor({0, 3}))"},
    {"relu", NULL, "t:relu() -> tensor\nNegative elements become 0; NaN stays.\n> orepa.tensor({-1, 2}):relu()"},
    {"clamp", NULL,
     "t:clamp(lowest, highest) -> tensor\nEach element moved between two bounds.\n> orepa.arange(5):clamp(2, 4)"},
    {"multiply_add", NULL,
     "t:multiply_add(factor, term) -> tensor\nt * factor + term in one pass.\n"
     "> orepa.arange(3):multiply_add(2, 1)"},
    {"where", NULL,
     "t:where(a, b) -> tensor\na where t, a bool tensor, is true, else b; tensors or numbers, with broadcasting. Also "
     "orepa.where(t, a, b).\n> local x = orepa.arange(4); return x:gt(2):where(x, 0)"},
    {"eq", NULL,
     "t:eq(other) -> bool tensor\nWhether elements are equal (`==` tells whether two handles are one tensor).\n"
     "> orepa.arange(3):eq(2)"},
    {"ne", NULL, "t:ne(other) -> bool tensor\nWhether elements differ.\n> orepa.arange(3):ne(2)"},
    {"lt", NULL, "t:lt(other) -> bool tensor\nLess than.\n> orepa.arange(3):lt(2)"},
    {"le", NULL, "t:le(other) -> bool tensor\nLess than or equal.\n> orepa.arange(3):le(2)"},
    {"gt", NULL, "t:gt(other) -> bool tensor\nGreater than.\n> orepa.arange(3):gt(2)"},
    {"ge", NULL, "t:ge(other) -> bool tensor\nGreater than or equal.\n> orepa.arange(3):ge(2)"},
    {"isfinite", NULL, "t:isfinite() -> bool tensor\nNeither infinite nor NaN.\n> orepa.tensor({1, 1/0}):isfinite()"},
    {"isnan", NULL, "t:isnan() -> bool tensor\nNot a number.\n> orepa.tensor({1, 0/0}):isnan()"},
    {"logical_not", "__bnot", "t:logical_not() -> bool tensor, ~t\nWhether elements are 0.\n> ~orepa.arange(3):gt(1)"},
    {"logical_and", "__band",
     "t:logical_and(other) -> bool tensor, t & other\nWhether neither is 0.\n"
     "> local t = orepa.arange(5); return t:gt(1) & t:lt(5)"},
    {"logical_or", "__bor",
     "t:logical_or(other) -> bool tensor, t | other\nWhether not both are 0.\n"
     "> local t = orepa.arange(5); return t:lt(2) | t:gt(4)"},
    {"logical_xor", "__bxor",
     "t:logical_xor(other) -> bool tensor, t ~ other\nWhether one of both is 0.\n"
     "> local t = orepa.arange(5); return t:lt(4) ~ t:gt(2)"},
};

/* Functions whose result is not of the first operand's type have no form that is written into it. */
static bool has_in_place(const char *name) {
  static const char *const names[] = {"eq",         "ne",          "lt",    "le",          "gt",
                                      "ge",         "isfinite",    "isnan", "logical_not", "logical_and",
                                      "logical_or", "logical_xor", "where"};
  for (size_t k = 0; k < sizeof names / sizeof *names; k++)
    if (!strcmp(names[k], name))
      return false;
  return true;
}

/* With the table of methods on top and Tensor's metatable below it. */
static void register_functions(lua_State *L) {
  for (orepa_function f = 0; f < orepa_function_count(); f++) {
    const char *name = orepa_function_name(f);
    lua_pushinteger(L, f);
    lua_pushcclosure(L, l_apply, 1);
    bind_name(L, name);
    lua_setfield(L, -2, name);
    if (has_in_place(name)) {
      const char *in_place = lua_pushfstring(L, "%s_", name);
      lua_pushinteger(L, f);
      lua_pushcclosure(L, l_apply_in_place, 1);
      bind_name(L, in_place);
      lua_rawset(L, -3);
    }
  }
  for (size_t k = 0; k < sizeof documents / sizeof *documents; k++) {
    const char *name = documents[k].function;
    bind_document(L, lua_pushfstring(L, "t:%s", name), documents[k].text);
    if (has_in_place(name)) {
      const char *text = lua_pushfstring(L, "t:%s_(...) -> t\nt:%s(...) written into t.", name, name);
      bind_document(L, lua_pushfstring(L, "t:%s_", name), text);
      lua_pop(L, 2);
    }
    lua_pop(L, 1);
    if (documents[k].metamethod) {
      lua_pushinteger(L, orepa_function_by_name(name));
      lua_pushcclosure(L, orepa_function_arity(orepa_function_by_name(name)) == 1 ? l_apply_to_one : l_apply, 1);
      bind_name(L, name);
      lua_setfield(L, -3, documents[k].metamethod);
    }
  }
}

/* ---- reductions: t:sum(), t:sum(dim, ...), t:sum({dims}), each with {keepdim=true} last ---- */

static int l_reduce(lua_State *L) {
  static const char *const known[] = {"keepdim", NULL};
  orepa_reduction kind = (orepa_reduction)lua_tointeger(L, lua_upvalueindex(1));
  const char *name = lua_tostring(L, lua_upvalueindex(2));
  orepa_tensor *t = bind_tensor(L, 1);
  int top = lua_gettop(L), last = top > 1 && bind_is_options(L, top) ? top - 1 : top;
  bool keepdim = last < top && bind_option_boolean(L, bind_options(L, top, name, known), "keepdim", false);
  int axes[OREPA_MAX_RANK], count = 0;
  bool list = last >= 2 && lua_istable(L, 2);
  int given = list ? (int)lua_rawlen(L, 2) : last - 1;
  if (given > OREPA_MAX_RANK)
    return bind_error(L, "%s: %d dimensions listed, a tensor has at most %d", name, given, OREPA_MAX_RANK);
  for (; count < given; count++) {
    if (list)
      lua_rawgeti(L, 2, count + 1);
    else
      lua_pushvalue(L, 2 + count);
    axes[count] = bind_axis(L, -1, orepa_rank(t), name);
    lua_pop(L, 1);
  }
  BIND_RETURN(L, orepa_reduce(kind, t, count, count ? axes : NULL, keepdim));
}

static const struct {
  const char *name, *text;
} reductions[OREPA_REDUCTIONS] = {
    [OREPA_SUM] = {"sum",
                   "t:sum(dims..., {keepdim=}) -> tensor\nThe sum over some dimensions, or over all. Integers and "
                   "bools give int64.\n> orepa.ones(2, 3):sum(2)"},
    [OREPA_MEAN] = {"mean", "t:mean(dims..., {keepdim=}) -> tensor\nThe mean over some dimensions, or over all.\n"
                            "> orepa.ones(2, 3):mean()"},
    [OREPA_MAX] = {"max", "t:max(dims..., {keepdim=}) -> tensor\nThe largest element; NaN wins; equals share the "
                          "gradient.\n> orepa.arange(4):max()"},
    [OREPA_MIN] = {"min", "t:min(dims..., {keepdim=}) -> tensor\nThe smallest element.\n> orepa.arange(4):min()"},
    [OREPA_ARGMAX] = {"argmax",
                      "t:argmax(dim, {keepdim=}) -> int64 tensor\nWhere the largest element is, counted from 0 "
                      "like labels; the first of equals.\n> orepa.arange(4):argmax(1)"},
    [OREPA_ARGMIN] = {"argmin", "t:argmin(dim, {keepdim=}) -> int64 tensor\nWhere the smallest is, counted from 0.\n"
                                "> orepa.arange(4):argmin(1)"},
    [OREPA_ALL] = {"all", "t:all(dims..., {keepdim=}) -> bool tensor\nWhether no element is 0.\n> orepa.ones(2):all()"},
    [OREPA_ANY] = {"any",
                   "t:any(dims..., {keepdim=}) -> bool tensor\nWhether some element is not 0.\n> orepa.ones(2):any()"},
};

static void register_reductions(lua_State *L) {
  for (int k = 0; k < OREPA_REDUCTIONS; k++) {
    lua_pushinteger(L, k);
    lua_pushstring(L, reductions[k].name);
    lua_pushcclosure(L, l_reduce, 2);
    bind_name(L, reductions[k].name);
    lua_setfield(L, -2, reductions[k].name);
    bind_document(L, lua_pushfstring(L, "t:%s", reductions[k].name), reductions[k].text);
    lua_pop(L, 1);
  }
}

static int l_matmul(lua_State *L) {
  orepa_tensor *a = bind_tensor(L, 1), *b = bind_tensor(L, 2);
  BIND_RETURN(L, orepa_matmul(a, b));
}

/* ---- masks ---- */

static int l_where(lua_State *L) {
  return apply(L, orepa_function_by_name("where"));
}

/* value where the mask is true, else t: the operands of `where`. All is checked before the op begins. */
static void masked_operands(lua_State *L, orepa_operand *operands) {
  orepa_tensor *t = bind_tensor(L, 1), *mask = bind_tensor(L, 2);
  if (orepa_tensor_dtype(mask) != OREPA_BOOL)
    bind_error(L, "masked_fill: the mask is %s; a bool tensor expected", orepa_dtype_name(orepa_tensor_dtype(mask)));
  operands[0] = (orepa_operand){.tensor = mask};
  operands[1] = bind_operand(L, 3);
  operands[2] = (orepa_operand){.tensor = t};
}

static int l_masked_fill(lua_State *L) {
  orepa_operand operands[3];
  masked_operands(L, operands);
  BIND_RETURN(L, orepa_apply(orepa_function_by_name("where"), operands));
}

static int l_masked_fill_(lua_State *L) {
  orepa_operand operands[3];
  masked_operands(L, operands);
  orepa_tensor **filled = bind_new(L);
  *filled = orepa_apply(orepa_function_by_name("where"), operands);
  if (!*filled && bind_retry(L))
    *filled = orepa_apply(orepa_function_by_name("where"), operands);
  if (!*filled)
    return bind_fail(L);
  BIND_RETURN_SELF(L, orepa_copy_(bind_tensor(L, 1), *filled));
}

/* ---- writing ---- */

static int l_copy(lua_State *L) {
  orepa_tensor *dst = bind_tensor(L, 1), *src = bind_tensor(L, 2);
  BIND_RETURN_SELF(L, orepa_copy_(dst, src));
}

static int l_fill(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  orepa_operand value = bind_number(L, 2);
  BIND_RETURN_SELF(L, orepa_fill_of_(t, value));
}

static int l_zero(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  BIND_RETURN_SELF(L, orepa_fill_(t, 0));
}

static const bind_row functions[] = {
    {"where", l_where,
     "where(condition, a, b) -> tensor\na where a bool tensor is true, else b; tensors or numbers, with broadcasting.\n"
     "> orepa.where(orepa.arange(4):gt(2), 1, 0)"},
    {NULL, NULL, NULL},
};

static const bind_row methods[] = {
    {"matmul", l_matmul,
     "t:matmul(other) -> tensor\nThe matrix product (..., M, K) . (..., K, N), leading dimensions broadcast.\n"
     "> orepa.ones(2, 3):matmul(orepa.ones(3, 4))"},
    {"masked_fill", l_masked_fill,
     "t:masked_fill(mask, value) -> tensor\nA number or a tensor where a bool tensor is true, t elsewhere; both are "
     "broadcast.\n> orepa.arange(4):masked_fill(orepa.arange(4):gt(2), 0)"},
    {"masked_fill_", l_masked_fill_,
     "t:masked_fill_(mask, value) -> t\nt:masked_fill(mask, value) written into t.\n"
     "> orepa.arange(4):masked_fill_(orepa.arange(4):gt(2), 0)"},
    {"copy_", l_copy,
     "t:copy_(source) -> t\nWrites the source, broadcast and converted, into t.\n"
     "> orepa.zeros(2, 3):copy_(orepa.ones(3))"},
    {"fill_", l_fill, "t:fill_(value) -> t\nWrites one value everywhere.\n> orepa.zeros(2):fill_(3)"},
    {"zero_", l_zero, "t:zero_() -> t\nWrites zeros.\n> orepa.ones(2):zero_()"},
    {NULL, NULL, NULL},
};

void bind_elementwise_family(lua_State *L) {
  bind_register(L, "orepa.", functions);
  luaL_getmetatable(L, BIND_TENSOR);
  bind_push_methods(L);
  register_functions(L);
  register_reductions(L);
  bind_register(L, "t:", methods);
  lua_pop(L, 2);
}
