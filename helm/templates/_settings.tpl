{{/* Settings as variables, secrets as files: LORARY_SECRETS_DIR holds one file a secret, named like its variable. */}}

{{- define "lorary.env" -}}
{{- $s3 := .Values.s3 -}}
- {name: HOME, value: /tmp}
- {name: LORARY_STATE_DIR, value: /var/lib/lorary}
- {name: LORARY_SECRETS_DIR, value: /run/secrets/lorary}
- {name: LORARY_PUBLIC_URL, value: {{ default (include "lorary.url" .) .Values.publicUrl | quote }}}
- {name: LORARY_BLOB_URL, value: {{ ternary "s3://lorary" $s3.url .Values.trial.s3.enabled | quote }}}
- {name: LORARY_S3_ENDPOINT_URL, value: {{ ternary (include "lorary.trial.s3Url" .) $s3.endpointUrl .Values.trial.s3.enabled | quote }}}
- {name: LORARY_S3_PUBLIC_ENDPOINT_URL, value: {{ $s3.publicEndpointUrl | quote }}}
- {name: LORARY_S3_REGION, value: {{ $s3.region | quote }}}
- {name: LORARY_S3_ADDRESSING_STYLE, value: {{ $s3.addressingStyle | quote }}}
- {name: LORARY_S3_ENCRYPTION, value: {{ $s3.encryption | quote }}}
- {name: LORARY_S3_KMS_KEY_ID, value: {{ $s3.kmsKeyId | quote }}}
{{- /* clients outside the cluster cannot reach a trial's store */}}
- {name: LORARY_S3_DIRECT_UPLOADS, value: {{ and $s3.directUploads (or (not .Values.trial.s3.enabled) (ne $s3.publicEndpointUrl "")) | quote }}}
{{- range $name, $value := .Values.settings }}
- {name: {{ printf "LORARY_%s" (upper $name) }}, value: {{ include "lorary.text" $value | quote }}}
{{- end }}
{{- end -}}

{{- define "lorary.metricsEnv" -}}
- {name: LORARY_METRICS_HOST, value: "0.0.0.0"}
- {name: LORARY_METRICS_PORT, value: {{ .Values.metrics.port | quote }}}
{{- end -}}

{{- define "lorary.tracingEnv" -}}
{{- with .Values.tracing.endpoint -}}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }}}
{{- end -}}
{{- end -}}

{{/* Helm reads whole numbers as floats: 20971520 must not become 2.097152e+07. */}}
{{- define "lorary.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}{{ printf "%.0f" . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{- define "lorary.secretsMount" -}}
- name: secrets
  mountPath: /run/secrets/lorary
  readOnly: true
{{- end -}}

{{/* (dict "root" $ "secrets" (list "app" "system")): a projected volume with just these. */}}
{{- define "lorary.secretsVolume" -}}
{{- $values := .root.Values -}}
{{- $trial := printf "%s-trial" (include "lorary.fullname" .root) -}}
{{- $database := ternary (printf "%s-database" $trial) $values.database.existingSecret $values.trial.postgresql.enabled -}}
{{- $broker := ternary (printf "%s-broker" $trial) $values.broker.existingSecret $values.trial.redis.enabled -}}
{{- $s3 := ternary (printf "%s-s3" $trial) $values.s3.existingSecret $values.trial.s3.enabled -}}
{{- $keys := ternary (printf "%s-keys" $trial) "" $values.trial.secrets.enabled -}}
{{- $known := dict
  "app" (list $database $values.database.appUrlKey "lorary_database_url")
  "system" (list $database $values.database.systemUrlKey "lorary_database_system_url")
  "owner" (list $database $values.database.ownerUrlKey "lorary_database_owner_url")
  "broker" (list $broker $values.broker.urlKey "lorary_broker_url")
  "s3Id" (list $s3 $values.s3.accessKeyIdKey "lorary_s3_access_key_id")
  "s3Secret" (list $s3 $values.s3.secretAccessKeyKey "lorary_s3_secret_access_key")
  "secretKey" (list (default $values.secretKey.existingSecret $keys) $values.secretKey.key "lorary_secret_key")
  "previous" (list (ternary $values.secretKey.existingSecret "" (ne $values.secretKey.previousKey "")) $values.secretKey.previousKey "lorary_secret_key_previous")
  "firstAdmin" (list (default $values.adminKey.existingSecret $keys) $values.adminKey.key "lorary_first_admin_key")
  "apiKey" (list (default $values.adminKey.existingSecret $keys) $values.adminKey.key "lorary_api_key")
  "replicaKey" (list (default $values.replicaKey.existingSecret $keys) $values.replicaKey.key "lorary_replica_key")
-}}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- range .secrets }}
      {{- $source := index $known . }}
      {{- if index $source 0 }}
      - secret:
          name: {{ index $source 0 }}
          items:
            - {key: {{ index $source 1 | quote }}, path: {{ index $source 2 }}}
      {{- end }}
      {{- end }}
{{- end -}}
