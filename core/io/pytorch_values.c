/* pytorch_values.c: what a pickle's values are where they are no tensors: plain ones as text, others by the name of
 * their class. */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/pytorch.h"

enum { MOST_LONG_BYTES = 32 };

/* ---- text ---- */

int text_append(text_buffer *text, const char *bytes, size_t length) {
  if (text->room - text->length <= length) {
    size_t room = 2 * (text->length + length) + 32;
    char *grown = realloc(text->bytes, room);
    if (!grown)
      return -1;
    text->bytes = grown;
    text->room = room;
  }
  memcpy(text->bytes + text->length, bytes, length);
  text->length += length;
  text->bytes[text->length] = '\0';
  return 0;
}

static int append_words(text_buffer *text, const char *words) {
  return text_append(text, words, strlen(words));
}

/* ---- numbers ---- */

static int append_integer(text_buffer *text, int64_t integer) {
  char digits[32];
  snprintf(digits, sizeof digits, "%lld", (long long)integer);
  return append_words(text, digits);
}

/* With as many digits as give the same number back; a fraction is a fraction in JSON too. */
static int append_number(text_buffer *text, double number) {
  char digits[40] = "";
  for (int precision = 15; precision <= 17; precision++) {
    snprintf(digits, sizeof digits, "%.*g", precision, number);
    if (strtod(digits, NULL) == number)
      break;
  }
  if (isfinite(number) && !strpbrk(digits, ".e"))
    strcat(digits, ".0");
  return append_words(text, digits);
}

/* Decimal digits of a little-endian integer in two's complement, by dividing it again and again. */
static int append_long(text_buffer *text, const pickle_text *number) {
  unsigned char bytes[MOST_LONG_BYTES], digits[3 * MOST_LONG_BYTES];
  size_t length = number->length, count = 0;
  bool negative = number->bytes[length - 1] & 0x80;
  for (size_t k = 0, carry = 1; k < length; k++) {
    unsigned byte = (unsigned char)number->bytes[k];
    bytes[k] = (unsigned char)(negative ? (byte ^ 0xff) + carry : byte);
    carry = carry && negative && byte == 0;
  }
  while (length) {
    unsigned rest = 0;
    for (size_t k = length; k-- > 0;) {
      unsigned part = rest << 8 | bytes[k];
      bytes[k] = (unsigned char)(part / 10);
      rest = part % 10;
    }
    digits[sizeof digits - ++count] = (unsigned char)('0' + rest);
    while (length && !bytes[length - 1])
      length--;
  }
  return (negative && append_words(text, "-")) ||
         text_append(text, (const char *)digits + sizeof digits - count, count);
}

/* ---- NumPy's scalars ---- */

/* The bytes of bytes, or of _codecs.encode(text, 'latin1'), which is how protocol 2 has them: how many, at most `most`;
 * -1: it is neither. */
static int read_short_bytes(const pickle_value *v, unsigned char *bytes, int most) {
  const pickle_text *text = &v->text;
  bool encoded = v->kind == PICKLE_OBJECT && pickle_is_global(v->object.callable, "_codecs", "encode") &&
                 v->object.arguments->items.count == 2 && v->object.arguments->items.values[0]->kind == PICKLE_TEXT;
  if (encoded)
    text = &v->object.arguments->items.values[0]->text;
  else if (v->kind != PICKLE_BYTES)
    return -1;
  int count = 0;
  for (size_t k = 0; k < text->length; k++) {
    unsigned byte = (unsigned char)text->bytes[k];
    if (encoded && byte >= 0xc2 && byte <= 0xc3 && k + 1 < text->length)
      byte = (byte & 3) << 6 | ((unsigned char)text->bytes[++k] & 0x3f);
    if (count == most)
      return -1;
    bytes[count++] = (unsigned char)byte;
  }
  return count;
}

/* The value of a NumPy scalar of the types that training scripts leave in a checkpoint: f4 f8 i4 i8 b1. */
static int append_numpy(text_buffer *text, const pickle_value *v) {
  const pickle_list *arguments = &v->object.arguments->items;
  if ((!pickle_is_global(v->object.callable, "numpy._core.multiarray", "scalar") &&
       !pickle_is_global(v->object.callable, "numpy.core.multiarray", "scalar")) ||
      arguments->count != 2 || arguments->values[0]->kind != PICKLE_OBJECT)
    return 0;
  const pickle_value *type = arguments->values[0], *state = type->object.state;
  const pickle_list *words = &type->object.arguments->items;
  if (!pickle_is_global(type->object.callable, "numpy", "dtype") || !words->count ||
      (state && state->kind == PICKLE_TUPLE && state->items.count > 1 && pickle_is_text(state->items.values[1], ">")))
    return 0;
  unsigned char bytes[8] = {0};
  int count = read_short_bytes(arguments->values[1], bytes, sizeof bytes);
  double wide;
  float narrow;
  int64_t integer;
  int32_t small;
  memcpy(&wide, bytes, sizeof wide);
  memcpy(&narrow, bytes, sizeof narrow);
  memcpy(&integer, bytes, sizeof integer);
  memcpy(&small, bytes, sizeof small);
  if (count == 8 && pickle_is_text(words->values[0], "f8"))
    return append_number(text, wide) ? -1 : 1;
  if (count == 4 && pickle_is_text(words->values[0], "f4"))
    return append_number(text, narrow) ? -1 : 1;
  if (count == 8 && pickle_is_text(words->values[0], "i8"))
    return append_integer(text, integer) ? -1 : 1;
  if (count == 4 && pickle_is_text(words->values[0], "i4"))
    return append_integer(text, small) ? -1 : 1;
  if (count == 1 && pickle_is_text(words->values[0], "b1"))
    return append_words(text, bytes[0] ? "true" : "false") ? -1 : 1;
  return 0;
}

/* ---- plain values ---- */

static int append_string(text_buffer *text, const pickle_text *string, bool quoted) {
  int valid = format_is_text(string->bytes, string->length);
  if (valid <= 0)
    return valid;
  if (!quoted)
    return text_append(text, string->bytes, string->length) ? -1 : 1;
  json_t *json = json_stringn_nocheck(string->bytes, string->length);
  char *shown = json ? json_dumps(json, JSON_ENCODE_ANY) : NULL;
  int failed = !shown || append_words(text, shown);
  free(shown);
  json_decref(json);
  return failed ? -1 : 1;
}

/* torch.device('cuda', 0) is cuda:0. */
static int append_device(text_buffer *text, const pickle_list *words) {
  const pickle_value *index = words->count == 2 ? words->values[1] : NULL;
  if (!words->count || words->values[0]->kind != PICKLE_TEXT || (index && index->kind != PICKLE_INTEGER))
    return 0;
  int written = append_string(text, &words->values[0]->text, false);
  if (written == 1 && index && (append_words(text, ":") || append_integer(text, index->integer)))
    return -1;
  return written;
}

/* What is one word of text; `quoted`: within a list. */
static int append_scalar(text_buffer *text, const pickle_value *v, bool quoted) {
  switch (v->kind) {
  case PICKLE_NONE:
    return append_words(text, "null") ? -1 : 1;
  case PICKLE_BOOL:
    return append_words(text, v->truth ? "true" : "false") ? -1 : 1;
  case PICKLE_INTEGER:
    return append_integer(text, v->integer) ? -1 : 1;
  case PICKLE_LONG:
    return v->text.length > MOST_LONG_BYTES ? 0 : append_long(text, &v->text) ? -1 : 1;
  case PICKLE_FLOAT:
    return append_number(text, v->number) ? -1 : 1;
  case PICKLE_TEXT:
  case PICKLE_BYTES:
    return append_string(text, &v->text, quoted);
  case PICKLE_GLOBAL: /* torch.float32 and the like */
    if (v->global.module.length != 5 || memcmp(v->global.module.bytes, "torch", 5) ||
        format_is_text(v->global.name.bytes, v->global.name.length) != 1)
      return 0;
    return append_words(text, "torch.") || text_append(text, v->global.name.bytes, v->global.name.length) ? -1 : 1;
  case PICKLE_OBJECT:
    return pickle_is_global(v->object.callable, "torch", "device") ? append_device(text, &v->object.arguments->items)
                                                                   : append_numpy(text, v);
  default:
    return 0;
  }
}

int pytorch_write_plain(text_buffer *text, const pickle_value *v, int64_t most) {
  const pickle_list *items = pytorch_sequence(v);
  size_t before = text->length;
  if (!items)
    return append_scalar(text, v, false);
  int written = append_words(text, "[") ? -1 : 1;
  for (uint32_t k = 0; k < items->count && written == 1; k++) {
    written = k && append_words(text, ", ") ? -1 : 1;
    if (written == 1)
      written = append_scalar(text, items->values[k], true);
    if (written == 1 && (int64_t)text->length > most)
      return -2;
  }
  if (written == 1 && append_words(text, "]"))
    return -1;
  if (written == 0) {
    text->length = before;
    text->bytes[before] = '\0';
  }
  return written;
}

const pickle_list *pytorch_sequence(const pickle_value *v) {
  if (v->kind == PICKLE_OBJECT && pickle_is_global(v->object.callable, "torch", "Size") &&
      v->object.arguments->items.count == 1)
    v = v->object.arguments->items.values[0];
  return v->kind == PICKLE_TUPLE || v->kind == PICKLE_LIST ? &v->items : NULL;
}

const pickle_list *pytorch_dictionary(const pickle_value *v) {
  if (v->kind == PICKLE_DICT)
    return &v->items;
  if (v->kind != PICKLE_OBJECT)
    return NULL;
  bool known = pickle_is_global(v->object.callable, "collections", "OrderedDict") ||
               pickle_is_global(v->object.callable, "collections", "defaultdict");
  return known || v->object.items.count ? &v->object.items : NULL;
}

/* ---- kinds ---- */

static const char *const kinds[] = {
    [PICKLE_NONE] = "None",           [PICKLE_BOOL] = "a bool",       [PICKLE_INTEGER] = "an integer",
    [PICKLE_LONG] = "a long integer", [PICKLE_FLOAT] = "a float",     [PICKLE_TEXT] = "text that is not UTF-8",
    [PICKLE_BYTES] = "bytes",         [PICKLE_TUPLE] = "a tuple",     [PICKLE_LIST] = "a list",
    [PICKLE_SET] = "a set",           [PICKLE_DICT] = "a dictionary",
};

void pytorch_write_kind(const pickle_value *v, char kind[PYTORCH_KIND_BYTES]) {
  char module[FORMAT_QUOTED_BYTES], name[FORMAT_QUOTED_BYTES];
  for (int depth = 0; depth < 4; depth++) {
    const pickle_value *of = v->kind == PICKLE_OBJECT ? v->object.callable : NULL;
    if (v->kind == PICKLE_PERSISTENT && v->identity->kind == PICKLE_TUPLE && v->identity->items.count > 1)
      of = v->identity->items.values[1]; /* ('module', class, ...) and ('storage', type, ...) */
    if (!of)
      break;
    v = of;
  }
  if (v->kind <= PICKLE_DICT)
    snprintf(kind, PYTORCH_KIND_BYTES, "%s", kinds[v->kind]);
  else if (v->kind != PICKLE_GLOBAL)
    snprintf(kind, PYTORCH_KIND_BYTES, "an object");
  else
    snprintf(kind, PYTORCH_KIND_BYTES, "%s.%s",
             format_printable(v->global.module.bytes, v->global.module.length, module),
             format_printable(v->global.name.bytes, v->global.name.length, name));
}
