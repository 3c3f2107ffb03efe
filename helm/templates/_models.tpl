{{/* Volumes with base models: the cache, and those of runtimes that bring their own. Read only, but for who fetches. */}}

{{/* Folder of a runtime's base model. (dict "root" $ "name" "smollm2" "runtime" $runtime) */}}
{{- define "lorary.modelPath" -}}
{{ default (printf "%s/%s" .root.Values.modelCache.mountPath .name) .runtime.model.path }}
{{- end -}}

{{/* Those of every runtime, or of the one that is named. (dict "root" $ ["only" "smollm2"]) */}}
{{- define "lorary.modelMounts" -}}
{{- $needsCache := and (not .only) .root.Values.modelCache.enabled -}}
{{- range $name, $runtime := include "lorary.runtimes" .root | fromJson -}}
{{- if or (not $.only) (eq $.only $name) -}}
{{- if $runtime.model.volume }}
- name: model-{{ $name }}
  mountPath: {{ include "lorary.modelPath" (dict "root" $.root "name" $name "runtime" $runtime) }}
  readOnly: true
{{- else -}}
{{- $needsCache = true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $needsCache }}
- name: models
  mountPath: {{ .root.Values.modelCache.mountPath }}
  readOnly: true
{{- end -}}
{{- end -}}

{{- define "lorary.modelVolumes" -}}
{{- $needsCache := and (not .only) .root.Values.modelCache.enabled -}}
{{- range $name, $runtime := include "lorary.runtimes" .root | fromJson -}}
{{- if or (not $.only) (eq $.only $name) -}}
{{- if $runtime.model.volume }}
- name: model-{{ $name }}
  {{- toYaml $runtime.model.volume | nindent 2 }}
{{- else -}}
{{- $needsCache = true -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $needsCache }}
{{ include "lorary.modelCacheVolume" .root }}
{{- end -}}
{{- end -}}

{{- define "lorary.hubTokenVolume" -}}
{{- with .model.fetch.tokenSecret -}}
- name: hub-token
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - {key: token, path: token}
{{- end -}}
{{- end -}}

{{/* Values merge, so that {type: Recreate} still has our rollingUpdate beside it. */}}
{{- define "lorary.strategy" -}}
{{- if eq .type "Recreate" -}}
type: Recreate
{{- else -}}
{{ toYaml . }}
{{- end -}}
{{- end -}}

{{/* Not empty where any runtime's base model is fetched from a hub. */}}
{{- define "lorary.anyFetch" -}}
{{- range $name, $runtime := include "lorary.runtimes" $ | fromJson -}}
{{- if $runtime.model.fetch.repository -}}yes{{- end -}}
{{- end -}}
{{- end -}}
