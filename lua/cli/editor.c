/* editor.c: libedit, with completion by Lua code and with pasted pieces taken as one. */
#include "editor.h"

#include <errno.h>
#include <histedit.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <unistd.h>
#include <wchar.h>

#include <lauxlib.h>

#include "interrupt.h"

enum { HISTORY = 5000, INTERRUPT = 3 /* Ctrl-C */, COLUMNS = 80 };

static const char paste_on[] = "\033[?2004h", paste_off[] = "\033[?2004l", paste_end[] = "\033[201~";

/* One terminal, one editor. */
static struct {
  EditLine *line;
  History *history;
  lua_State *L;
  int complete; /* reference of the function */
  const char *prompt;
  bool reads;     /* the terminal passes every key on as it is */
  bool discarded; /* by Ctrl-C */
  char *pasted;   /* a piece of several lines: malloc's */
  size_t length;
} editor;

static char *prompt(EditLine *line) {
  (void)line;
  return (char *)editor.prompt;
}

/* Waits for input; false if Ctrl-C came before it. The signal is let in only while this waits, so that none is missed.
 */
static bool wait_for_input(void) {
  fd_set input;
  sigset_t interrupt, usual;
  FD_ZERO(&input);
  FD_SET(STDIN_FILENO, &input);
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  sigprocmask(SIG_BLOCK, &interrupt, &usual);
  bool came = interrupt_came();
  while (!came && pselect(STDIN_FILENO + 1, &input, NULL, NULL, NULL, &usual) < 0 && errno == EINTR)
    came = interrupt_came();
  sigprocmask(SIG_SETMASK, &usual, NULL);
  return !came;
}

/* A character; Ctrl-C's where a signal comes instead. */
static int read_character(EditLine *line, wchar_t *character) {
  mbstate_t state = {0};
  (void)line;
  if (!editor.reads) {
    editor.reads = true;
    fputs(paste_on, stdout);
    fflush(stdout);
  }
  for (;;) {
    char byte;
    if (!wait_for_input()) {
      *character = INTERRUPT;
      return 1;
    }
    ssize_t count = read(STDIN_FILENO, &byte, 1);
    if (count < 0 && errno == EINTR)
      continue;
    if (count <= 0)
      return (int)count;
    size_t used = mbrtowc(character, &byte, 1, &state);
    if (used == (size_t)-2)
      continue; /* more bytes */
    if (used == (size_t)-1)
      *character = L'?';
    return 1;
  }
}

static unsigned char discard(EditLine *line, int character) {
  (void)line, (void)character;
  editor.discarded = true;
  fputs("^C\n", stdout);
  return CC_EOF;
}

/* ---- completion ---- */

static const char *candidate(lua_State *L, int list, lua_Integer k) {
  lua_geti(L, list, k);
  const char *text = lua_tostring(L, -1);
  lua_pop(L, 1); /* the list holds it */
  return text;
}

static void show_candidates(lua_State *L, int list, lua_Integer count) {
  struct winsize size;
  size_t width = 0, across = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) || !size.ws_col ? COLUMNS : size.ws_col;
  for (lua_Integer k = 1; k <= count; k++) {
    size_t length = strlen(candidate(L, list, k));
    width = length > width ? length : width;
  }
  lua_Integer columns = (lua_Integer)(across / (width + 2));
  columns = columns < 1 ? 1 : columns;
  for (lua_Integer k = 1; k <= count; k++)
    printf("%s%-*s", k % columns == 1 || columns == 1 ? "\n" : "", (int)width + 2, candidate(L, list, k));
  fputs("\n", stdout);
}

static unsigned char complete(EditLine *line, int character) {
  lua_State *L = editor.L;
  const LineInfo *info = el_line(line);
  int top = lua_gettop(L);
  unsigned char answer = CC_ERROR;
  (void)character;
  lua_rawgeti(L, LUA_REGISTRYINDEX, editor.complete);
  lua_pushlstring(L, info->buffer, (size_t)(info->cursor - info->buffer));
  if (lua_pcall(L, 1, 2, 0) == LUA_OK && lua_isstring(L, top + 1) && lua_istable(L, top + 2)) {
    lua_Integer count = luaL_len(L, top + 2);
    size_t there = strlen(lua_tostring(L, top + 1)), same = 0;
    const char *first = count ? candidate(L, top + 2, 1) : "";
    if (count)
      same = strlen(first);
    for (lua_Integer k = 2; k <= count; k++) {
      const char *other = candidate(L, top + 2, k);
      size_t common = 0;
      while (common < same && other[common] == first[common])
        common++;
      same = common;
    }
    if (same > there) {
      lua_pushlstring(L, first + there, same - there);
      answer = el_insertstr(line, lua_tostring(L, -1)) ? CC_ERROR : CC_REFRESH;
    } else if (count > 1) {
      show_candidates(L, top + 2, count);
      answer = CC_REDISPLAY;
    }
  }
  lua_settop(L, top);
  return answer;
}

/* ---- pasting ---- */

static bool append(char **text, size_t *length, size_t *room, const char *more, size_t count) {
  if (*length + count + 1 > *room) {
    size_t wanted = 2 * (*length + count) + 256;
    char *larger = realloc(*text, wanted);
    if (!larger)
      return false;
    *text = larger;
    *room = wanted;
  }
  memcpy(*text + *length, more, count);
  *length += count;
  (*text)[*length] = '\0';
  return true;
}

/* What the terminal sends between its marks. Without an end of line it is typed text; with one, it and the line that it
 * stands in are a piece. */
static unsigned char paste(EditLine *line, int character) {
  char *text = NULL, bytes[MB_LEN_MAX];
  size_t length = 0, room = 0, end = sizeof paste_end - 1;
  wchar_t c;
  bool ended = false, failed = !append(&text, &length, &room, "", 0);
  (void)character;
  while (!failed && !ended && el_wgetc(line, &c) == 1) {
    mbstate_t state = {0};
    size_t count = wcrtomb(bytes, c == L'\r' ? L'\n' : c, &state);
    failed = count == (size_t)-1 ? false : !append(&text, &length, &room, bytes, count);
    ended = length >= end && !memcmp(text + length - end, paste_end, end);
  }
  if (ended)
    text[length -= end] = '\0';
  unsigned char answer = CC_ERROR;
  if (!failed && !strchr(text, '\n')) {
    answer = el_insertstr(line, text) ? CC_ERROR : CC_REFRESH;
  } else if (!failed) {
    const LineInfo *info = el_line(line);
    size_t before = (size_t)(info->cursor - info->buffer), after = (size_t)(info->lastchar - info->cursor);
    char *whole = NULL;
    size_t all = 0, all_room = 0;
    if (append(&whole, &all, &all_room, info->buffer, before) && append(&whole, &all, &all_room, text, length) &&
        append(&whole, &all, &all_room, info->cursor, after)) {
      fputs(text, stdout);
      editor.pasted = whole;
      editor.length = all;
      answer = CC_EOF;
    } else {
      free(whole);
    }
  }
  free(text);
  return answer;
}

/* ---- in Lua ---- */

static int l_read(lua_State *L) {
  int length = 0;
  editor.prompt = luaL_checkstring(L, 1);
  editor.reads = false;
  editor.L = L;
  editor.discarded = false;
  interrupt_came();
  el_resize(editor.line);
  fflush(stdout);
  const char *line = el_gets(editor.line, &length);
  fputs(paste_off, stdout);
  fflush(stdout);
  if (editor.pasted) {
    while (editor.length && editor.pasted[editor.length - 1] == '\n')
      editor.length--;
    lua_pushlstring(L, editor.pasted, editor.length);
    free(editor.pasted);
    editor.pasted = NULL;
    fputs("\n", stdout);
    return 1;
  }
  if (line && length > 0) {
    lua_pushlstring(L, line, (size_t)(line[length - 1] == '\n' ? length - 1 : length));
    return 1;
  }
  lua_pushnil(L);
  if (!editor.discarded)
    return 1;
  lua_pushliteral(L, "interrupted");
  return 2;
}

static int l_enter(lua_State *L) {
  HistEvent event;
  history(editor.history, &event, H_ENTER, luaL_checkstring(L, 1));
  return 0;
}

void editor_push(lua_State *L, int complete_at) {
  HistEvent event;
  lua_pushvalue(L, complete_at);
  editor.complete = luaL_ref(L, LUA_REGISTRYINDEX);
  editor.line = el_init("orepa", stdin, stdout, stderr);
  editor.history = history_init();
  if (!editor.line || !editor.history)
    luaL_error(L, "no memory for the prompt");
  history(editor.history, &event, H_SETSIZE, HISTORY);
  history(editor.history, &event, H_SETUNIQUE, 1);
  el_set(editor.line, EL_PROMPT, prompt);
  el_set(editor.line, EL_EDITOR, "emacs");
  el_set(editor.line, EL_HIST, history, editor.history);
  el_set(editor.line, EL_GETCFN, read_character);
  el_set(editor.line, EL_ADDFN, "complete", "Complete a name, an option or a path", complete);
  el_set(editor.line, EL_ADDFN, "discard", "Give the line up", discard);
  el_set(editor.line, EL_ADDFN, "paste", "Take a pasted piece", paste);
  el_set(editor.line, EL_BIND, "^I", "complete", NULL);
  el_set(editor.line, EL_BIND, "^C", "discard", NULL);
  el_set(editor.line, EL_BIND, "\033[200~", "paste", NULL);
  el_set(editor.line, EL_BIND, "^R", "em-inc-search-prev", NULL);
  el_source(editor.line, NULL); /* ~/.editrc */
  lua_createtable(L, 0, 2);
  lua_pushcfunction(L, l_read);
  lua_setfield(L, -2, "read");
  lua_pushcfunction(L, l_enter);
  lua_setfield(L, -2, "enter");
}
